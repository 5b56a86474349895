"""What drives a network: the training and testing model, its schedule, its validation, its display."""

"""What drives a network: the training and testing model, its schedule, its validation, its display."""

# Importing BasicSR registers our networks and models, some of them from this package: that has to be over before any
# module here begins, or whichever is asked for first would be met half imported.
import basicsr

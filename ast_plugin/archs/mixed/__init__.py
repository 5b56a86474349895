"""Any registered network with blocks exchanged by rules."""

"""LMDBs of pairs: their format, writing them so that they are whole or not there, reading and checking them."""

"""LMDBs of image pairs: format, atomic writing, reading and checking."""

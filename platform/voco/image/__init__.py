"""Encoded images: which kinds of file are read, what is wrong with any other, and the one way to RGB."""

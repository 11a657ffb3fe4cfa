"""Operators of rank 0: vectors from files of other programs, and differences of mean hidden states."""

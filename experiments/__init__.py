"""Experiments: the paper's claims tested, one command each, resumable; see the README files in the folders."""

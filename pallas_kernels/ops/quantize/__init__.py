"""Quantisation of arrays; see ``api``."""

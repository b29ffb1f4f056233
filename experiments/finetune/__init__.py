"""Finetuning methods compared: quality, step time and memory."""

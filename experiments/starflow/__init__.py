"""Flows on digits, procedural shapes and latents, and what a compressed cache costs them."""

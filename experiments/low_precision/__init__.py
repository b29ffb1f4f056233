"""How much quality and time low-precision training costs; see README.md."""

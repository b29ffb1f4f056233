"""How much attention SpargeAttn leaves out on inputs with structure, within an error bound."""

"""KV-cache compression measured on tasks that small models learn in minutes."""

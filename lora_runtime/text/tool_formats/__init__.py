"""How families of models write calls of tools: one file each, with its reading and its grammar."""

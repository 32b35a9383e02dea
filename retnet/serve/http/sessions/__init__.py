"""Sessions: states of conversations that the server keeps, in memory and in files."""

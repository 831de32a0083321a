"""Every built-in operator under every law that it declares, and against its slow twin."""

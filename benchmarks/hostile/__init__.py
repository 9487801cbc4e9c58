"""What the world may send: a misbehaving web site, spellings of inside addresses, bad pictures, files and words."""

"""Token rows as memory-mapped Arrow files: schema, writer, reader, order, and the manifest that says what is whole."""

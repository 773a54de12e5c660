"""Everything on disk and nothing else: manifest, layout, writer, reader."""

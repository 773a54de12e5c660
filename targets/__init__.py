"""The science, pure tensor functions: relations, codecs, losses."""

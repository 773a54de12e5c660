"""The class embedding, or the pooled embedding, of a view."""

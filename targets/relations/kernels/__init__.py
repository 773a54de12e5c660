"""The hot loops of relations: fused on a GPU, chunked elsewhere, tested against plain torch."""

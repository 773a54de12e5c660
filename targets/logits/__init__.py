"""Class logits: the softmax over all classes of a teacher."""

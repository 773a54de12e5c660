"""tinymim: distil a large masked-image-modelling ViT into many small ones, paying for the large one once."""

__version__ = "0.1.0"

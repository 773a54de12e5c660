"""Descriptions of fields that several sections or recipes have."""

STAGE = "Command that the recipe is for."
SOURCE = "Images."
VIEWS = "View law."
TRAIN = "Labelled images to train on."
VAL = "Labelled images to test on."
WEIGHTS = "`random`, `hub`, `package:NAME`, or a .safetensors or .pth file (docs/parity.md)."
LOADER = "Loader processes."
RUN = "Run folder, device and seed."
MEAN = (
    "Mean per RGB channel, for pixels in 0..1. Default: what the weights or their timm name state; required where "
    "they state none (docs/parity.md)."
)
STD = "Standard deviation per RGB channel. Default: as for `mean`."
RESIZE_RATIO = (
    "The short side is resized to input size x ratio, then the centre is cropped (256/224). `squeeze`: the whole image "
    "becomes the square (TinyViT at 384 px)."
)
KIND = "Kind of target. Default: relations."
AT = "Tokens after the tapped block, those that its attention reads (after its first norm), or after the final norm."
AT_EMBEDDING = "The class token after the final norm or the tapped block, or the embedding that the classifier reads."

"""Whether transformers is there, and new enough: imported before anything of it, to say so in words."""

MINIMUM_VERSION = (5, 17)

try:
    import transformers
except ImportError as error:
    raise ImportError("the Hugging Face integration needs transformers: pip install 'flexprefill-fa[hf]'") from error
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < MINIMUM_VERSION:
    raise ImportError(
        f"the Hugging Face integration needs transformers >= {'.'.join(map(str, MINIMUM_VERSION))}, "
        f"got {transformers.__version__}"
    )

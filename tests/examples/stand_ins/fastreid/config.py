import functools
import inspect


class CfgNode(dict):
    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name, value):
        self[name] = value


def get_cfg():
    heads = CfgNode(NAME="EmbeddingHead", NUM_CLASSES=0, EMBEDDING_DIM=0, WITH_BNNECK=False, NECK_FEAT="before")
    backbone = CfgNode(NAME="build_resnet_backbone", DEPTH="50x", PRETRAIN=False, FEAT_DIM=2048)
    losses = CfgNode(NAME=("CrossEntropyLoss",))
    model = CfgNode(META_ARCHITECTURE="Baseline", DEVICE="cuda", BACKBONE=backbone, HEADS=heads, LOSSES=losses)
    model.update(PIXEL_MEAN=[123.7, 116.3, 103.5], PIXEL_STD=[58.4, 57.1, 57.4])
    return CfgNode(MODEL=model)


def configurable(init):
    """The constructor takes a configuration, which ``from_config`` turns into its keyword arguments, or those."""

    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        if args and isinstance(args[0], CfgNode):
            kwargs = {**type(self).from_config(args[0]), **kwargs}
            args = ()
        inspect.signature(init).bind(self, *args, **kwargs)
        init(self, *args, **kwargs)

    return wrapped

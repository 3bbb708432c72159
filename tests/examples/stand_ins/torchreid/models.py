from torch import nn


class Backbone(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 512, 8, 8)
        self.global_avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = None
        self.classifier = nn.Linear(512, num_classes)

    def featuremaps(self, x):
        return self.conv(x)

    def forward(self, x):
        v = self.global_avgpool(self.featuremaps(x)).flatten(1)
        return (self.classifier(v), v) if self.training else v


def build_model(name, num_classes, loss="softmax", pretrained=True, use_gpu=True):
    return Backbone(num_classes)

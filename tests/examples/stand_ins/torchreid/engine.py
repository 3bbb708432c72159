import torch
from torch.nn import functional as F


class VideoTripletEngine:
    """``run`` trains with triplet and cross-entropy losses on frames and tests with the mean over frames.

    A subclass changes this in ``parse_data_for_train`` and ``extract_features``.
    """

    def __init__(self, datamanager, model, optimizer, margin=0.3, weight_t=1, weight_x=1, scheduler=None, use_gpu=True):
        self.datamanager = datamanager
        self.model = model
        self.optimizer = optimizer
        self.margin = margin
        self.weights = weight_t, weight_x
        self.scheduler = scheduler

    def parse_data_for_train(self, data):
        imgs, pids = data["img"], data["pid"]
        return imgs.flatten(0, 1), pids.repeat_interleave(imgs.shape[1])

    def parse_data_for_eval(self, data):
        return data["img"], data["pid"], data["camid"]

    def extract_features(self, input):
        return self.model(input.flatten(0, 1)).unflatten(0, input.shape[:2]).mean(1)

    def forward_backward(self, data):
        imgs, pids = self.parse_data_for_train(data)
        outputs, features = self.model(imgs)
        distances = torch.cdist(features, features)
        same = pids[:, None] == pids
        hardest = (distances * same).amax(1) - distances.masked_fill(same, torch.inf).amin(1)
        loss = self.weights[0] * F.relu(hardest + self.margin).mean() + self.weights[1] * F.cross_entropy(outputs, pids)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def run(self, save_dir="log", max_epoch=0, dist_metric="euclidean", ranks=(1, 5, 10, 20)):
        for _ in range(max_epoch):
            self.model.train()
            for data in self.datamanager.train_loader:
                self.forward_backward(data)
        self.model.eval()
        for loaders in self.datamanager.test_loader.values():
            with torch.no_grad():
                query, gallery = (
                    torch.cat([self.extract_features(self.parse_data_for_eval(data)[0]) for data in loaders[part]])
                    for part in ("query", "gallery")
                )
            assert query.dim() == 2
            assert query.shape[1] == gallery.shape[1]

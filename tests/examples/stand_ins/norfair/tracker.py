import itertools


class Detection:
    def __init__(self, points, scores=None, data=None, label=None, embedding=None):
        self.points = points
        self.scores = scores
        self.data = data
        self.label = label
        self.embedding = embedding
        self.age = None


class TrackedObject:
    """``past_detections`` are at most ``past_detections_length``, spread over its life."""

    def __init__(self, tracker, detection):
        self.tracker = tracker
        self.id = None
        self.hit_counter = 1
        self.reid_hit_counter = None
        self.age = 0
        self.is_initializing = True
        self.past_detections = []
        self.keep(detection)

    def keep(self, detection):
        self.last_detection = detection
        length = self.tracker.past_detections_length
        if len(self.past_detections) == length:
            if self.age < length * self.past_detections[0].age:
                return
            self.past_detections.pop(0)
        detection.age = self.age
        self.past_detections.append(detection)

    def hit(self, detection):
        self.keep(detection)
        self.hit_counter = min(self.hit_counter + 2, self.tracker.hit_counter_max)
        if self.is_initializing and self.hit_counter > self.tracker.initialization_delay:
            self.is_initializing = False
            self.id = next(self.tracker.ids)

    def merge(self, new):
        self.reid_hit_counter, self.hit_counter = None, 2
        for detection in new.past_detections:
            self.keep(detection)
        self.last_detection = new.last_detection


class Tracker:
    def __init__(
        self,
        distance_function,
        distance_threshold,
        hit_counter_max=15,
        initialization_delay=None,
        past_detections_length=4,
        reid_distance_function=None,
        reid_distance_threshold=0,
        reid_hit_counter_max=None,
    ):
        assert distance_function == "iou"
        self.distance_threshold = distance_threshold
        self.hit_counter_max = hit_counter_max
        self.initialization_delay = hit_counter_max // 2 if initialization_delay is None else initialization_delay
        self.past_detections_length = past_detections_length
        self.reid_distance_function = reid_distance_function
        self.reid_distance_threshold = reid_distance_threshold
        self.reid_hit_counter_max = reid_hit_counter_max
        self.tracked_objects = []
        self.ids = itertools.count(1)

    def update(self, detections=None):
        alive, dead = [], []
        for track in self.tracked_objects:
            if track.hit_counter >= 0:
                alive.append(track)
            elif self.reid_hit_counter_max is not None and (track.reid_hit_counter or 0) >= 0 and track.id:
                dead.append(track)
        self.tracked_objects = alive + dead
        for track in self.tracked_objects:
            if track.reid_hit_counter is not None:
                track.reid_hit_counter -= 1
            elif track.hit_counter <= 0:
                track.reid_hit_counter = self.reid_hit_counter_max
            track.hit_counter -= 1
            track.age += 1

        known, new = ([t for t in alive if t.is_initializing is flag] for flag in (False, True))
        left, hit = list(detections or []), []
        for tracks in (known, new):
            for detection, track in greedy(left, tracks, iou_distance, self.distance_threshold):
                track.hit(detection)
                hit.append(track)
                left.remove(detection)
        if self.reid_distance_function:
            lost = [t for t in known if t not in hit] + dead
            found = [t for t in new if t in hit]
            for track, old in greedy(found, lost, self.reid_distance_function, self.reid_distance_threshold):
                old.merge(track)
                self.tracked_objects.remove(track)
        self.tracked_objects += [TrackedObject(self, detection) for detection in left]
        return [t for t in self.tracked_objects if not t.is_initializing and t.hit_counter >= 0]


def greedy(candidates, tracks, distance, threshold):
    """The nearest pair first, as long as it is nearer than the threshold."""
    pairs = sorted(
        ((distance(c, t), i, j) for i, c in enumerate(candidates) for j, t in enumerate(tracks)), key=lambda p: p[0]
    )
    taken = []
    for value, i, j in pairs:
        if value < threshold and all(i != a and j != b for a, b in taken):
            taken.append((i, j))
    return [(candidates[i], tracks[j]) for i, j in taken]


def iou_distance(detection, track):
    (ax1, ay1), (ax2, ay2) = detection.points
    (bx1, by1), (bx2, by2) = track.last_detection.points
    shared = max(min(ax2, bx2) - max(ax1, bx1), 0) * max(min(ay2, by2) - max(ay1, by1), 0)
    return 1 - shared / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - shared)

"""A product that labels faces, in a process of its own environment.

``python -I product.py NAME FOLDER``, by the Python of the product's environment, reads requests
from standard input, ``{"pictures": [path, ...]}``, and answers each on a line of standard output:
``labels``, one for each picture; ``ns``, how long each took, from its file on; ``cpu_ns``, the
process's CPU time for all; ``classes`` and ``version`` of the product. Nothing is imported but the
standard library and what the product's documentation says. Every picture is a face that is cut
already: a product with a face detector is told so. product.cjs is the same in JavaScript.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import IO, Any

Label = Callable[[str], str]
"""From a picture's path to the product's word for what it shows."""

Product = tuple[Label, Iterable[str], str]
"""What labels, the words that it knows, and its version."""


def efficientface_deploy(folder: str) -> Product:
    """This toolkit, as README.md shows it."""
    import efficientface_deploy as ef

    predictor = ef.load()
    version = importlib.metadata.version("efficientface-deploy")
    return lambda path: predictor(path).label, predictor.spec.labels, version


def fer(folder: str) -> Product:
    """The package of this name; ``offsets`` is the margin that it would put around a found face."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import cv2
    from fer.fer import FER

    detector = FER(offsets=(0, 0))

    def label(path: str) -> str:
        picture: Any = cv2.imread(path)
        whole = (0, 0, picture.shape[1], picture.shape[0])
        emotions = detector.detect_emotions(picture, [whole])[0]["emotions"]
        return str(max(emotions, key=emotions.__getitem__))

    words = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
    return label, words, importlib.metadata.version("fer")


def deepface(folder: str) -> Product:
    """The package of this name, without its detectors, by the engine that it installs."""
    os.environ.setdefault("DEEPFACE_BACKEND_ENGINE", "onnx")
    from deepface import DeepFace

    def label(path: str) -> str:
        found = DeepFace.analyze(path, ("emotion",), detector_backend="skip", silent=True)
        return str(found[0]["dominant_emotion"])

    words = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")
    return label, words, importlib.metadata.version("deepface")


def emotiefflib(folder: str) -> Product:
    """The package of this name, with the model of its examples."""
    import cv2
    from emotiefflib.facial_analysis import EmotiEffLibRecognizer

    recogniser = EmotiEffLibRecognizer(engine="onnx", model_name="enet_b0_8_best_vgaf")

    def label(path: str) -> str:
        picture: Any = cv2.imread(path)
        picture = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
        return str(recogniser.predict_emotions(picture, logits=True)[0][0])

    words = recogniser.idx_to_emotion_class.values()
    return label, words, importlib.metadata.version("emotiefflib")


def opencv_zoo(folder: str) -> Product:
    """The class that lies beside the model in OpenCV's zoo, without alignment by five points."""
    sys.path.insert(0, folder)
    import cv2
    from facial_fer_model import FacialExpressionRecog

    model = "facial_expression_recognition_mobilefacenet_2022july.onnx"
    recogniser = FacialExpressionRecog(os.path.join(folder, model))

    def label(path: str) -> str:
        picture: Any = cv2.imread(path)
        (best,) = recogniser.infer(cv2.resize(picture, (112, 112)))
        return str(recogniser.getDesc(int(best)))

    return label, [recogniser.getDesc(index) for index in range(7)], cv2.__version__


PRODUCTS: dict[str, Callable[[str], Product]] = {
    "efficientface-deploy": efficientface_deploy,
    "fer": fer,
    "deepface": deepface,
    "emotiefflib": emotiefflib,
    "opencv-zoo": opencv_zoo,
}


def serve(product: Product, requests: IO[str], answers: IO[str]) -> None:
    """Answer every request."""
    label, classes, version = product
    about = {"classes": list(classes), "version": version}
    for line in requests:
        labels, ns = [], []
        cpu = time.process_time_ns()
        for path in json.loads(line)["pictures"]:
            start = time.perf_counter_ns()
            labels.append(label(path))
            ns.append(time.perf_counter_ns() - start)
        own = {"labels": labels, "ns": ns, "cpu_ns": time.process_time_ns() - cpu}
        print(json.dumps({**own, **about}), file=answers, flush=True)


def main(name: str, folder: str) -> None:
    """Open the product and serve; what it prints goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        serve(PRODUCTS[name](folder), sys.stdin, answers)


if __name__ == "__main__":
    main(*sys.argv[1:])

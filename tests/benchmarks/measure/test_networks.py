from __future__ import annotations

import math

import numpy as np

from benchmarks.measure.networks import DEPLOY, STRAIGHT, relative_difference


def test_logits_that_are_not_numbers_are_no_match():
    expected = np.ones((1, 7), np.float32)
    assert relative_difference(expected * np.nan, expected) == math.inf
    assert relative_difference(expected * 1.5, expected) == 0.5


def test_files_are_made_once(network):
    path = network.onnx(DEPLOY)
    before = path.stat().st_mtime_ns
    assert network.onnx(DEPLOY) == path and path.stat().st_mtime_ns == before
    assert network.onnx(DEPLOY, float_input=True) != path


def test_what_a_network_needs_is_counted_in_the_straight_graph(network):
    from onnx import load_model

    from efficientface_export.graph.io import multiply_adds

    assert network.multiply_adds() == multiply_adds(load_model(network.onnx(STRAIGHT)))


def test_random_weights_are_those_of_the_seed(network):
    from benchmarks.measure.networks import random_network

    again = random_network(network.spec, 0).state_dict()
    assert all((again[name] == value).all() for name, value in network.module.state_dict().items())

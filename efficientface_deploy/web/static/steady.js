// Labels of a stream that do not flicker: a port of efficientface_deploy/vision/steady.py.

import { MEMORY } from "./tracks.js";

const [TIME_CONSTANT, MARGIN, LEAST] = [0.2, 1, 1e-3];
const [FIRST_SECONDS, LEAST_SECONDS] = [0.04, 1e-3];

/** Averages the log-probabilities of each face over time, and holds its label. */
export class SteadyLabels {
  #states = new Map();

  /**
   * @param {number} track the face's number
   * @param {number} seconds the frame's time
   * @param {ArrayLike<number>} probabilities
   * @returns the smoothed probabilities, and the index of the label
   */
  update(track, seconds, probabilities) {
    const logs = Array.from(probabilities, (value) => Math.log(Math.max(value, LEAST)));
    for (const [other, { seen }] of this.#states) {
      if (seconds - seen > MEMORY) this.#states.delete(other);
    }
    let state = this.#states.get(track);
    if (state === undefined) {
      state = { mean: logs, weight: share(FIRST_SECONDS), seen: seconds, label: best(logs) };
      this.#states.set(track, state);
    } else {
      const part = share(Math.max(seconds - state.seen, LEAST_SECONDS));
      state.weight += part * (1 - state.weight);
      state.mean = state.mean.map((old, at) => old + (part / state.weight) * (logs[at] - old));
      state.seen = seconds;
      const leader = best(state.mean);
      if (state.mean[leader] > state.mean[state.label] + MARGIN) state.label = leader;
    }
    const smooth = state.mean.map(Math.exp);
    const sum = smooth.reduce((total, value) => total + value, 0);
    return { probabilities: smooth.map((value) => value / sum), label: state.label };
  }
}

function share(seconds) {
  return -Math.expm1(-seconds / TIME_CONSTANT);
}

/** The index of the largest value, the first of several. */
export function best(values) {
  return values.indexOf(Math.max(...values));
}

// Which face of a frame is which face before it: a port of efficientface_deploy/vision/tracks.py.

export const MEMORY = 2; // seconds for which a face that is not seen keeps its number

const [REACH, REACH_PER_SECOND, MAX_REACH, MAX_GROWTH] = [0.5, 3, 2, 0.7];
const [LOST_COST, MOVEMENT_SECONDS, MOVEMENT_LASTS] = [0.3, 0.2, 0.5];

/** Numbers the faces of a stream, from 1; a number is never given twice. */
export class Tracker {
  #tracks = [];
  #next = 1;

  /** The numbers of a frame's faces; seconds never go back. */
  update(faces, seconds) {
    this.#tracks = this.#tracks.filter((track) => seconds - track.seen <= MEMORY);
    const places = faces.map(({ box: [left, top, right, bottom] }) => ({
      centre: [(left + right) / 2, (top + bottom) / 2],
      size: Math.sqrt((right - left) * (bottom - top)),
    }));
    const found = this.#assign(places, seconds);
    return places.map((place, index) => {
      if (found.has(index)) return follow(found.get(index), place, seconds);
      const track = { number: this.#next++, ...place, seen: seconds, movement: [0, 0] };
      this.#tracks.push(track);
      return track.number;
    });
  }

  /** Known tracks of faces, the nearest pairs first. */
  #assign(places, seconds) {
    const pairs = [];
    for (const track of this.#tracks) {
      const lost = seconds - track.seen;
      const guess = guessed(track, seconds);
      for (const [index, { centre, size }] of places.entries()) {
        const growth = Math.abs(Math.log(size / track.size));
        const away = Math.hypot(guess[0] - centre[0], guess[1] - centre[1]);
        const distance = away / Math.sqrt(size * track.size);
        const reach = Math.min(REACH + REACH_PER_SECOND * lost, MAX_REACH);
        if (distance > reach || growth > MAX_GROWTH) continue;
        pairs.push({ track, index, cost: distance + growth + LOST_COST * lost });
      }
    }
    const found = new Map();
    const taken = new Set();
    for (const { track, index } of pairs.sort((one, other) => one.cost - other.cost)) {
      if (found.has(index) || taken.has(track)) continue;
      found.set(index, track);
      taken.add(track);
    }
    return found;
  }
}

function guessed({ centre, movement, seen }, seconds) {
  const lasts = MOVEMENT_LASTS * -Math.expm1((seen - seconds) / MOVEMENT_LASTS);
  return [centre[0] + lasts * movement[0], centre[1] + lasts * movement[1]];
}

function follow(track, { centre, size }, seconds) {
  const passed = seconds - track.seen;
  if (passed > 0) {
    const share = -Math.expm1(-passed / MOVEMENT_SECONDS);
    track.movement = track.movement.map(
      (speed, axis) => speed + share * ((centre[axis] - track.centre[axis]) / passed - speed),
    );
  }
  Object.assign(track, { centre, size, seen: seconds });
  return track.number;
}

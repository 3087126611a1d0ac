/** An error for people: what was expected, what was found, and what to do about it. */
export class EfficientFaceError extends Error {
  constructor(subject, expected, found, fix) {
    super(`${subject}: expected ${expected}, found ${found}; ${fix}`);
    this.name = "EfficientFaceError";
    Object.assign(this, { subject, expected, found, fix });
  }
}

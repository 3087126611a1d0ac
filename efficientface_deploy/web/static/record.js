// What was seen on the page, as CSV.

const MOST = 500_000; // rows: hours of a camera

/** Rows of what was seen: one for each face of each picture or frame. */
export class Record {
  labels = [];
  #rows = [];

  /** Take in the faces of a picture, or of a frame at a time in seconds. */
  add(name, seconds, faces) {
    for (const { box, score, small, track, prediction } of faces) {
      if (this.#rows.length === MOST) return;
      const place = box.map((edge) => edge.toFixed(1));
      const values = this.labels.map((label) => prediction.probabilities[label].toFixed(4));
      const time = seconds === "" ? "" : seconds.toFixed(3);
      const said = small ? ["too small", "", ""] : [prediction.label, prediction.confidence.toFixed(4), prediction.unsure ?? ""];
      this.#rows.push([name, time, track ?? "", ...place, score.toFixed(3), ...said, ...values]);
    }
    document.getElementById("save").disabled = this.#rows.length === 0;
  }

  /** The whole of it. */
  csv() {
    const edges = ["left", "top", "right", "bottom"];
    const header = ["source", "seconds", "face", ...edges, "score", "label", "confidence", "unsure"];
    return [[...header, ...this.labels], ...this.#rows]
      .map((row) => `${row.map(quoted).join(",")}\r\n`)
      .join("");
  }

  /** Give it to the browser to save: no request is made. */
  save() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([this.csv()], { type: "text/csv" }));
    link.download = "faces.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }
}

function quoted(value) {
  const text = String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/** What is labelled: a picture in any form that a page has it in. */
export type ImageSource =
  | Blob
  | ImageData
  | HTMLImageElement
  | HTMLVideoElement
  | HTMLCanvasElement
  | OffscreenCanvas
  | ImageBitmap
  | VideoFrame
  /** RGB or RGBA bytes. */
  | { data: Uint8Array | Uint8ClampedArray; width: number; height: number };

export interface ModelSpec {
  readonly labels: readonly string[];
  /** Side of the square input, pixels. */
  readonly input_size: number;
  readonly face_crop: "as-is" | "box" | "aligned";
  readonly resize: "bilinear" | "bicubic";
  readonly colour: "rgb" | "grey";
  readonly name: string;
  readonly sure_above?: number;
  readonly sure_precision?: number;
}

export interface Prediction {
  /** The most probable class; in a stream the steady one. */
  label: string;
  /** Its probability, 0 to 1. */
  confidence: number;
  probabilities: Record<string, number>;
  /** Whether the label is less sure than the model promises of sure ones; null without promise. */
  unsure: boolean | null;
}

export type Point = [x: number, y: number];

export interface FacePrediction {
  /** Left, top, right, bottom, pixels of the picture; may reach beyond it. */
  box: [number, number, number, number];
  /** The detector's confidence, 0 to 1. */
  score: number;
  /** Left eye, right eye, tip of the nose, left and right corner of the mouth, as seen. */
  points: [Point, Point, Point, Point, Point];
  /** Whether the face has too few pixels to be judged. */
  small: boolean;
  prediction: Prediction;
  /** In a stream the face's number, from 1; null in a picture. */
  track: number | null;
  /** In a stream what the network says about this frame alone. */
  raw: Prediction | null;
}

export interface FaceOptions {
  /** Smallest score of a face, 0 to 1; 0.5 unless given. */
  minScore?: number;
  /** Longer side of the smallest face that is wanted, pixels. */
  minFace?: number | null;
}

export interface Stream {
  /** Label the faces of the next frame; seconds never go back. */
  predictFaces(
    image: ImageSource,
    seconds: number,
    options?: FaceOptions,
  ): Promise<FacePrediction[]>;
}

export interface Predictor {
  readonly spec: ModelSpec;
  readonly provenance: Record<string, unknown>;
  readonly provider: "wasm" | "webgpu";
  readonly threads: number;
  /** What the file's probe showed at load; null where it has none, or was not asked. */
  readonly checked: { difference: number; tolerance: number } | null;
  /** Milliseconds of the last predictFaces, by step. */
  readonly times: { search: number; prepare: number; label: number };
  /** Label one face, which fills the picture. */
  predict(image: ImageSource): Promise<Prediction>;
  /** Label several faces in one pass. */
  predictBatch(images: Iterable<ImageSource>): Promise<Prediction[]>;
  /** Find the faces of a picture and label each, the most confident first. */
  predictFaces(image: ImageSource, options?: FaceOptions): Promise<FacePrediction[]>;
  /** Follow the faces of a video or camera: numbers that last, and labels that do not flicker. */
  follow(): Stream;
  /** Run preprocessed images: uint8 (N, S, S, 3), RGB, to float32 (N, C). */
  infer(pixels: Uint8Array): Promise<{ logits: Float32Array; probabilities: Float32Array }>;
  /** Free the model. */
  close(): Promise<void>;
}

export interface LoadOptions {
  /** An ONNX file of efficientface-export; model.onnx beside this module unless given. */
  model?: string | URL | ArrayBuffer | Uint8Array;
  /** yunet.onnx as this package writes it, for pictures of any size; null for none. */
  detector?: string | URL | ArrayBuffer | Uint8Array | null;
  /** Folder with ONNX Runtime Web; ort/ beside this module unless given. */
  runtime?: string | URL;
  provider?: "wasm" | "webgpu";
  /**
   * Threads where the page is cross-origin isolated; else there is one. A page's first load
   * decides for all.
   */
  threads?: number | null;
  /** Whether to check the model by its probe. */
  check?: boolean;
}

/**
 * Load a model, and check that it computes here what its file says.
 *
 * @throws EfficientFaceError
 */
export function load(options?: LoadOptions): Promise<Predictor>;

/** Says what was expected, what was found, and what to do about it. */
export class EfficientFaceError extends Error {
  readonly subject: string;
  readonly expected: string;
  readonly found: string;
  readonly fix: string;
}

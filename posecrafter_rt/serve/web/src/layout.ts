// The 134 keypoints: their order, names, neighbours and colours, as in posecrafter_rt/poses.

export const NUM_KEYPOINTS = 134;
export const CONFIDENCE_THRESHOLD = 0.3;

/** A half-open range of keypoints. */
export interface Range {
  start: number;
  stop: number;
}

export const BODY: Range = { start: 0, stop: 18 };
export const FEET: Range = { start: 18, stop: 24 };
export const FACE: Range = { start: 24, stop: 92 };
export const LEFT_HAND: Range = { start: 92, stop: 113 };
export const RIGHT_HAND: Range = { start: 113, stop: 134 };

export const NOSE = 0;
export const NECK = 1;
export const RIGHT_SHOULDER = 2;
export const RIGHT_WRIST = 4;
export const LEFT_SHOULDER = 5;
export const LEFT_WRIST = 7;
export const RIGHT_ANKLE = 10;
export const LEFT_ANKLE = 13;

const BODY_NAMES = [
  "nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow", "left wrist",
  "right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle",
  "right eye", "left eye", "right ear", "left ear",
];
const FEET_NAMES = [
  "left big toe", "left small toe", "left heel", "right big toe", "right small toe", "right heel",
];

/** Pairs of body points in the order of painting. Limb i and joint i both have the i-th colour. */
export const LIMBS: readonly (readonly [number, number])[] = [
  [1, 2], [1, 5], [2, 3], [3, 4], [5, 6], [6, 7], [1, 8], [8, 9], [9, 10],
  [1, 11], [11, 12], [12, 13], [1, 0], [0, 14], [14, 16], [0, 15], [15, 17],
];
export const COLOURS: readonly (readonly [number, number, number])[] = [
  [255, 0, 0], [255, 85, 0], [255, 170, 0], [255, 255, 0], [170, 255, 0], [85, 255, 0],
  [0, 255, 0], [0, 255, 85], [0, 255, 170], [0, 255, 255], [0, 170, 255], [0, 85, 255],
  [0, 0, 255], [85, 0, 255], [170, 0, 255], [255, 0, 255], [255, 0, 170], [255, 0, 85],
];
/** Five fingers of four bones each; a finger's first bone starts at the wrist, point 0. */
export const HAND_EDGES: readonly (readonly [number, number])[] = Array.from({ length: 20 }, (_, edge) => {
  const tip = edge + 1;
  return [tip % 4 === 1 ? 0 : tip - 1, tip] as const;
});

export interface Size {
  height: number;
  width: number;
}

/** One person on a canvas: x, y in its pixels (pixel centres at integers) and confidence; null if nobody is seen. */
export interface Pose {
  canvas: Size;
  points: Float32Array | null;
}

/** A keypoint's name for people: "left wrist", "face 30", "right hand 4". */
export function keypointName(index: number): string {
  if (index < BODY.stop) return BODY_NAMES[index] as string;
  if (index < FEET.stop) return FEET_NAMES[index - FEET.start] as string;
  if (index < FACE.stop) return `face ${index - FACE.start}`;
  if (index < LEFT_HAND.stop) return `left hand ${index - LEFT_HAND.start}`;
  return `right hand ${index - RIGHT_HAND.start}`;
}

/** Whether a keypoint's confidence is high enough to draw it. */
export function isVisible(points: Float32Array, index: number): boolean {
  return (points[index * 3 + 2] as number) >= CONFIDENCE_THRESHOLD;
}

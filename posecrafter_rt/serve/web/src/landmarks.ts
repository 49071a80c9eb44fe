// Converts MediaPipe Holistic's landmarks to the 134 keypoints, as posecrafter_rt/poses/layouts.py does.
import {
  BODY, FACE, FEET, LEFT_HAND, LEFT_SHOULDER, NECK, NUM_KEYPOINTS, RIGHT_HAND, RIGHT_SHOULDER, type Pose, type Size,
} from "./layout.ts";

/** x, y as fractions of the picture, from its top left corner. Only the pose's landmarks have a visibility. */
export interface Landmark {
  x: number;
  y: number;
  visibility?: number | undefined;
}

export interface Landmarks {
  pose?: Landmark[] | undefined;
  face?: Landmark[] | undefined;
  leftHand?: Landmark[] | undefined;
  rightHand?: Landmark[] | undefined;
}

/** The index of each body point among the 33. The neck is computed; the left shoulder is its placeholder. */
const MEDIAPIPE_BODY = [0, 11, 12, 14, 16, 11, 13, 15, 24, 26, 28, 23, 25, 27, 5, 2, 8, 7];
/** Our index and MediaPipe's of each big toe and heel. BlazePose has no small toe. */
const MEDIAPIPE_FEET: readonly (readonly [number, number])[] = [[0, 31], [2, 29], [3, 32], [5, 30]];
/** The face mesh's vertex nearest each iBUG point: jaw, brows, nose, eyes, outer lips, inner lips. */
const MESH_TO_IBUG = [
  162, 234, 93, 58, 172, 136, 149, 148, 152, 377, 378, 365, 397, 288, 323, 454, 389,
  71, 63, 105, 66, 107, 336, 296, 334, 293, 301,
  168, 197, 5, 4, 75, 97, 2, 326, 305,
  33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,
  61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181,
  78, 82, 13, 312, 308, 317, 14, 87,
];
const NUM_HAND_POINTS = 21;

/** Return the pose on a picture of this size. Its points are null if the tracker found nothing. */
export function poseFromLandmarks(found: Landmarks, picture: Size): Pose {
  const points = new Float32Array(NUM_KEYPOINTS * 3);
  const put = (index: number, landmark: Landmark | undefined, confidence: number) => {
    if (landmark === undefined || !isInside(landmark)) return;
    points[index * 3] = landmark.x * picture.width - 0.5;
    points[index * 3 + 1] = landmark.y * picture.height - 0.5;
    points[index * 3 + 2] = Math.min(Math.max(confidence, 0), 1);
  };
  const { pose, face, leftHand, rightHand } = found;
  MEDIAPIPE_BODY.forEach((theirs, ours) => put(BODY.start + ours, pose?.[theirs], pose?.[theirs]?.visibility ?? 1));
  for (const [ours, theirs] of MEDIAPIPE_FEET) put(FEET.start + ours, pose?.[theirs], pose?.[theirs]?.visibility ?? 1);
  MESH_TO_IBUG.forEach((theirs, ours) => put(FACE.start + ours, face?.[theirs], 1));
  for (let point = 0; point < NUM_HAND_POINTS; point++) {
    put(LEFT_HAND.start + point, leftHand?.[point], 1);
    put(RIGHT_HAND.start + point, rightHand?.[point], 1);
  }
  setNeck(points);
  const isSomebody = points.some((value, position) => position % 3 === 2 && value > 0);
  return { canvas: picture, points: isSomebody ? points : null };
}

/** The tracker also guesses hidden limbs, even outside the picture. Points outside count as not seen. */
function isInside({ x, y }: Landmark): boolean {
  return x >= 0 && x < 1 && y >= 0 && y < 1;
}

/** Set the neck to the middle of the shoulders, with the lower of their confidences. */
function setNeck(points: Float32Array): void {
  const confidence = Math.min(points[RIGHT_SHOULDER * 3 + 2] as number, points[LEFT_SHOULDER * 3 + 2] as number);
  for (const axis of [0, 1]) {
    const sum = (points[RIGHT_SHOULDER * 3 + axis] as number) + (points[LEFT_SHOULDER * 3 + axis] as number);
    points[NECK * 3 + axis] = confidence > 0 ? sum / 2 : 0;
  }
  points[NECK * 3 + 2] = confidence;
}

// Fitting a picture into a box, centred and undistorted.
import type { Size } from "./layout.ts";

/** Where a picture lies in its box: its point (x, y) goes to (left + (x + 0.5) · scale, top + (y + 0.5) · scale). */
export interface Placement {
  scale: number;
  left: number;
  top: number;
}

export function contain(picture: Size, box: Size): Placement {
  const scale = Math.min(box.width / picture.width, box.height / picture.height);
  return { scale, left: (box.width - picture.width * scale) / 2, top: (box.height - picture.height * scale) / 2 };
}

/** Place a picture so that it fills a frame with the same centre. placement: where the frame itself lies. */
export function cover(picture: Size, frame: Size, placement: Placement): Placement {
  const scale = placement.scale * Math.max(frame.width / picture.width, frame.height / picture.height);
  return {
    scale,
    left: placement.left + (frame.width * placement.scale - picture.width * scale) / 2,
    top: placement.top + (frame.height * placement.scale - picture.height * scale) / 2,
  };
}

/** Return the point of the picture that lies at (x, y) of the box. Its pixel centres are at integers. */
export function toPicture(placement: Placement, x: number, y: number): { x: number; y: number } {
  return { x: (x - placement.left) / placement.scale - 0.5, y: (y - placement.top) / placement.scale - 0.5 };
}

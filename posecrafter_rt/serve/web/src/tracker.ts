// MediaPipe Holistic, which finds the person in a picture. The page loads it when it first needs it.
import type { Holistic as HolisticTracker, Results } from "@mediapipe/holistic";
import { poseFromLandmarks } from "./landmarks.ts";
import type { Pose } from "./layout.ts";

/** Where the build puts MediaPipe's own files. */
const TRACKER_FOLDER = "tracker/";

/** A tracker that takes longer for a picture leaves the page no time for anything else. */
const SLOW_MS = 300;
/** The pause of a slow tracker between two pictures: enough for the avatar's frame to arrive and be shown. */
const REST_MS = 250;

declare global {
  interface Window {
    Holistic?: typeof HolisticTracker;
  }
}

/** The person, and the picture that was searched (mirrored if asked), which is valid until the next one. */
export interface Found {
  pose: Pose;
  picture: CanvasImageSource;
}

/** This installation has no tracker. */
export class NoTracker extends Error {}

/** Finds people. All sources share one tracker, because it is large and slow to load. */
export class Tracker {
  private loading: Promise<HolisticTracker> | null = null;
  private results: Results | null = null;
  private isMirrored = false;
  /** Working on a picture, or resting after one. */
  isBusy = false;
  /** Whether the last picture took long. Before the first picture, true is assumed. */
  isSlow = true;

  /** Load and warm up the tracker, unless that is done. Throws NoTracker if there is none. */
  async load(): Promise<HolisticTracker> {
    this.loading ??= loadHolistic((results) => (this.results = results));
    try {
      return await this.loading;
    } catch (error) {
      this.forget();
      throw error;
    }
  }

  /** Find the person in a video's current picture. Returns null while the tracker is busy with an older one. */
  async find(video: HTMLVideoElement, isMirrored: boolean): Promise<Found | null> {
    if (this.isBusy) return null;
    this.isBusy = true;
    const beginMs = performance.now();
    const size = { height: video.videoHeight, width: video.videoWidth };
    try {
      const holistic = await this.load();
      if (this.isMirrored !== isMirrored) holistic.setOptions({ selfieMode: isMirrored });
      this.isMirrored = isMirrored;
      this.results = null;
      await holistic.send({ image: video });
      return this.results === null ? null : understood(this.results, size);
    } catch (error) {
      this.forget();
      throw error;
    } finally {
      this.isSlow = performance.now() - beginMs > SLOW_MS;
      setTimeout(() => (this.isBusy = false), this.isSlow ? REST_MS : 0);
    }
  }

  /** After an error, load another one for the next picture. */
  private forget(): void {
    this.loading = null;
    this.isMirrored = false;
  }
}

function understood({ image, ...found }: Results, size: { height: number; width: number }): Found {
  const landmarks = {
    pose: found.poseLandmarks, face: found.faceLandmarks,
    leftHand: found.leftHandLandmarks, rightHand: found.rightHandLandmarks,
  };
  return { pose: poseFromLandmarks(landmarks, size), picture: image };
}

/** Load MediaPipe, which is a classic script and not a module. */
async function loadHolistic(onResults: (results: Results) => void): Promise<HolisticTracker> {
  if (window.Holistic === undefined) await loadScript(`${TRACKER_FOLDER}holistic.js`);
  const tracker = new (window.Holistic as typeof HolisticTracker)({ locateFile: (file) => TRACKER_FOLDER + file });
  tracker.setOptions({
    modelComplexity: 0, smoothLandmarks: true, refineFaceLandmarks: false, enableSegmentation: false, selfieMode: false,
  });
  tracker.onResults(onResults);
  await tracker.initialize();
  return tracker;
}

function loadScript(source: string): Promise<void> {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = source;
    script.onload = () => resolve();
    script.onerror = () => {
      script.remove();
      reject(new NoTracker("This installation has no tracker of people, which `make web` adds"));
    };
    document.head.append(script);
  });
}

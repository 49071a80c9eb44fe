// Frames per second and the median of recent latencies.

const WINDOW_MS = 2000;

/** Looks back over the last two seconds. */
export class Meter {
  private samples: { atMs: number; latencyMs: number }[] = [];

  /** Add a frame that was shown at `atMs`, `latencyMs` after its pose was sent. */
  add(atMs: number, latencyMs: number): void {
    this.samples.push({ atMs, latencyMs });
  }

  /** Return the frames per second up to `nowMs` and the median latency; null with fewer than two recent frames. */
  read(nowMs: number): { fps: number; latencyMs: number } | null {
    this.samples = this.samples.filter((sample) => nowMs - sample.atMs < WINDOW_MS);
    if (this.samples.length < 2) return null;
    const latencies = this.samples.map((sample) => sample.latencyMs).sort((a, b) => a - b);
    const spanMs = nowMs - (this.samples[0] as { atMs: number }).atMs;
    return {
      fps: (1000 * (this.samples.length - 1)) / Math.max(spanMs, 1),
      latencyMs: latencies[latencies.length >> 1] as number,
    };
  }

  /** Forget all frames; they say nothing about the next ones. */
  clear(): void {
    this.samples = [];
  }
}

// How long to wait before the next try to connect.

const FIRST_MS = 400;
const LONGEST_MS = 5000;
const GROWTH = 1.6;

/** Return the ms before try `attempt` (from 0). They grow up to a cap and vary by ±10 %, so that clients spread out. */
export function retryDelayMs(attempt: number, random: () => number = Math.random): number {
  return Math.min(FIRST_MS * GROWTH ** attempt, LONGEST_MS) * (0.9 + 0.2 * random());
}

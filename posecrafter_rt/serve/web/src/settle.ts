// One call for many changes that follow each other closely.

/** Return a function that calls `callback` once it has itself not been called for `quietMs`. */
export function whenSettled(callback: () => void, quietMs: number): () => void {
  let timer: ReturnType<typeof setTimeout> | undefined;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(callback, quietMs);
  };
}

// One call for many changes that follow each other closely.

/** A function that calls back once it has not been called for so long. */
export function whenSettled(callback: () => void, quietMs: number): () => void {
  let timer: ReturnType<typeof setTimeout> | undefined;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(callback, quietMs);
  };
}

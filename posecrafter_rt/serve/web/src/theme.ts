// The theme: light, dark or the system's. People choose it with a button, and the page remembers it.
import { byId } from "./dom.ts";

const THEMES = ["auto", "light", "dark"] as const;
const STORAGE_KEY = "theme";

export function setUpTheme(): void {
  const button = byId("theme", HTMLButtonElement);
  const remembered = fromStorage((storage) => storage.getItem(STORAGE_KEY));
  let chosen = THEMES.findIndex((theme) => theme === remembered);
  if (chosen < 0) chosen = 0;
  const apply = () => {
    const theme = THEMES[chosen] as string;
    document.documentElement.dataset["theme"] = theme;
    button.title = button.ariaLabel = `Theme: ${theme}`;
  };
  button.onclick = () => {
    chosen = (chosen + 1) % THEMES.length;
    fromStorage((storage) => storage.setItem(STORAGE_KEY, THEMES[chosen] as string));
    apply();
  };
  apply();
}

/** Returns null if the browser blocks storage, which it does by throwing. The choice then lasts as long as the page. */
function fromStorage<T>(use: (storage: Storage) => T): T | null {
  try {
    return use(localStorage);
  } catch {
    return null;
  }
}

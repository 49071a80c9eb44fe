// Light, dark, or as the system is: chosen with a button and remembered.
import { byId } from "./dom.ts";

const THEMES = ["auto", "light", "dark"] as const;
const STORAGE_KEY = "theme";

export function setUpTheme(): void {
  const button = byId("theme", HTMLButtonElement);
  let chosen = THEMES.findIndex((theme) => theme === localStorage.getItem(STORAGE_KEY));
  if (chosen < 0) chosen = 0;
  const apply = () => {
    const theme = THEMES[chosen] as string;
    document.documentElement.dataset["theme"] = theme;
    button.title = button.ariaLabel = `Theme: ${theme}`;
  };
  button.onclick = () => {
    chosen = (chosen + 1) % THEMES.length;
    localStorage.setItem(STORAGE_KEY, THEMES[chosen] as string);
    apply();
  };
  apply();
}

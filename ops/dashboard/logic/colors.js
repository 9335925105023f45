// Colours of the style sheet are written light-dark(LIGHT, DARK), which canvases do not understand.

// `scheme`: 'light' or 'dark'. Other values pass as they are.
export function pickScheme(value, scheme) {
  const both = /^light-dark\(\s*([^,]+?)\s*,\s*([^,]+?)\s*\)$/.exec(value.trim());
  if (!both) return value.trim();
  return scheme === 'dark' ? both[2] : both[1];
}

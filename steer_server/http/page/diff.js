// Words of two texts held against each other, and words to be marked.

/** The words of a text with where they stand: [{word, start, end}]; scripts without spaces are cut by the browser. */
export function words(text) {
  const found = [];
  const segmenter = new Intl.Segmenter(undefined, { granularity: "word" });
  for (const { segment, index, isWordLike } of segmenter.segment(text)) {
    if (isWordLike) found.push({ word: segment, start: index, end: index + segment.length });
  }
  return found;
}

/** The words of `text` that are not part of the longest common run of words with `base`, as [start, end) ranges: neighbours in one. */
export function changedRanges(base, text) {
  const a = words(base).map((each) => each.word);
  const b = words(text);
  const width = b.length + 1;
  // Length of the longest common subsequence of a[i:] and b[j:]; texts are a few hundred words.
  const table = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      table[i * width + j] = a[i] === b[j].word
        ? table[(i + 1) * width + j + 1] + 1
        : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    }
  }
  const ranges = [];
  let i = 0;
  for (let j = 0; j < b.length; j++) {
    while (i < a.length && a[i] !== b[j].word && table[(i + 1) * width + j] >= table[i * width + j + 1]) i++;
    if (i < a.length && a[i] === b[j].word) i++;
    else if (ranges.length && !text.slice(ranges.at(-1)[1], b[j].start).trim()) ranges.at(-1)[1] = b[j].end;
    else ranges.push([b[j].start, b[j].end]);
  }
  return ranges;
}

/** Where words stand in a text, as [start, end) ranges, in any case; in scripts with spaces whole words only. */
export function markedRanges(text, marks) {
  const ranges = [];
  for (const mark of marks) {
    const word = mark.normalize("NFC");
    if (!word) continue;
    const escaped = word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
    const whole = /^[\p{Script=Latin}\p{Script=Greek}\p{Script=Cyrillic}\p{N}]/u.test(word);
    const pattern = whole ? `(?<![\\p{L}\\p{N}])${escaped}(?:s|es)?(?![\\p{L}\\p{N}])` : escaped;
    for (const match of text.matchAll(new RegExp(pattern, "giu"))) ranges.push([match.index, match.index + match[0].length]);
  }
  return ranges;
}

/** Whether a place is within one of some ranges. */
export const within = (ranges, place) => ranges.some(([start, end]) => place >= start && place < end);

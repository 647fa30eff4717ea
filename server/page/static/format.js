// Numbers as people read them.

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const THIN = "\u202f";
export const NONE = "–";

/** 12345 → "12,345"; from a million on "1.23M". */
export function count(value) {
  return value < 1e6 ? whole.format(value) : short.format(value);
}

/** A rate: one decimal below ten. */
export function rate(value) {
  return value > 0 && value < 10 ? value.toFixed(1) : count(value);
}

/** Seconds as ms or s, to two digits; null as a dash. */
export function seconds(value) {
  if (value === null || value === undefined) {
    return NONE;
  }
  const [scaled, unit] = value >= 1 ? [value, "s"] : [value * 1e3, "ms"];
  return `${scaled > 0 && scaled < 9.95 ? scaled.toFixed(1) : count(scaled)}${THIN}${unit}`;
}

/** 0.256 → "25.6 %". */
export function share(value) {
  return `${digits(value * 100)}${THIN}%`;
}

/** Bytes in powers of 1024. */
export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (value >= 1024 && power < units.length - 1) {
    value /= 1024;
    power += 1;
  }
  return `${power === 0 ? value : digits(value)}${THIN}${units[power]}`;
}

/** How long: the two largest units. */
export function duration(value) {
  const left = Math.max(0, Math.floor(value));
  const parts = [
    [Math.floor(left / 86400), "d"],
    [Math.floor(left / 3600) % 24, "h"],
    [Math.floor(left / 60) % 60, "min"],
    [left % 60, "s"],
  ];
  const first = parts.findIndex(([number]) => number > 0);
  const shown = first < 0 ? parts.slice(3) : parts.slice(first, first + 2);
  return shown.map(([number, unit]) => `${number}${THIN}${unit}`).join(" ");
}

/** A point in time, given in seconds since 1970. */
export function moment(value) {
  return value ? new Date(value * 1000).toLocaleString() : NONE;
}

function digits(value) {
  return value >= 100 ? value.toFixed(0) : Number(value.toPrecision(3)).toString();
}

"use strict";
// Reads charts by pointer and by arrow keys: the nearest point of a line, or the cell of a matrix.
const reading = document.getElementById("reading");
const mark = document.getElementById("mark");

function numbers(grid) {
  if (!(grid.values instanceof Int16Array)) {
    const bytes = Uint8Array.from(atob(grid.values), (letter) => letter.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    grid.values = Int16Array.from({ length: bytes.length / 2 }, (_, k) => view.getInt16(2 * k, true));
  }
  return grid.values;
}

function span(at, block, size) {
  const first = at * block;
  const last = Math.min(first + block, size) - 1;
  return first === last ? String(first) : `${first}–${last}`;
}

function gridReading(grid, row, column) {
  const value = numbers(grid)[row * grid.columns + column] * grid.scale;
  const [left, top, right, bottom] = grid.box;
  const width = (right - left) / grid.columns;
  const height = (bottom - top) / grid.rows;
  const place = { x: left + (column + 0.5) * width, y: top + (row + 0.5) * height, width, height };
  if (grid.names) {
    const count = value === 1 ? "image" : "images";
    return { ...place, text: `${value} ${count} of ${grid.names[row]} taken for ${grid.names[column]}` };
  }
  const mixture = row * grid.block;
  const layer = grid.layers.filter((one) => one[1] <= mixture).pop() || ["", 0];
  const rows = span(row, grid.block, grid.size[0]);
  const columns = span(column, grid.block, grid.size[1]);
  const words = grid.block > 1 ? "largest mean α" : "mean α";
  return { ...place, text: `${layer[0]}, mixture ${rows}, cell ${columns}: ${words} ${value.toPrecision(3)}` };
}

function show(chart, found) {
  const box = chart.getBoundingClientRect();
  const x = window.scrollX + box.left + found.x * box.width;
  const y = window.scrollY + box.top + found.y * box.height;
  const width = Math.max((found.width || 0) * box.width, 10);
  const height = Math.max((found.height || 0) * box.height, 10);
  mark.hidden = reading.hidden = false;
  mark.style.borderRadius = found.width ? "0" : "50%";
  Object.assign(mark.style, { left: `${x - width / 2}px`, top: `${y - height / 2}px`, width: `${width}px`, height: `${height}px` });
  reading.textContent = found.text;
  const room = window.scrollX + document.documentElement.clientWidth - reading.offsetWidth - 8;
  const above = y - height / 2 - reading.offsetHeight - 8;
  reading.style.left = `${Math.max(Math.min(x + 12, room), 4)}px`;
  reading.style.top = `${above > window.scrollY ? above : y + height / 2 + 8}px`;
}

function hide() {
  mark.hidden = reading.hidden = true;
}

function keep(at, count) {
  return Math.max(0, Math.min(at, count - 1));
}

function setUp(chart) {
  const data = JSON.parse(chart.querySelector("script").textContent);
  const grid = data.grid;
  const lines = (data.series || []).filter((line) => line.length);
  if (!grid && !lines.length) return;
  const at = { row: 0, column: 0 };
  const read = () => {
    if (grid) return show(chart, gridReading(grid, at.row, at.column));
    const [x, y, text] = lines[at.row][at.column];
    show(chart, { x, y, text });
  };
  const point = (event) => {
    const box = chart.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width;
    const y = (event.clientY - box.top) / box.height;
    if (grid) {
      const [left, top, right, bottom] = grid.box;
      if (x < left || x >= right || y < top || y >= bottom) return hide();
      at.row = keep(Math.floor(((y - top) / (bottom - top)) * grid.rows), grid.rows);
      at.column = keep(Math.floor(((x - left) / (right - left)) * grid.columns), grid.columns);
    } else {
      let nearest = Infinity;
      lines.forEach((line, row) => line.forEach((one, column) => {
        // nearest along the lines first: a pointer follows the epochs
        const distance = ((one[0] - x) * box.width) ** 2 + (((one[1] - y) * box.height) ** 2) / 4;
        if (distance < nearest) [nearest, at.row, at.column] = [distance, row, column];
      }));
    }
    read();
  };
  chart.addEventListener("pointermove", point);
  chart.addEventListener("pointerdown", point);
  chart.addEventListener("pointerleave", hide);
  chart.addEventListener("focus", () => chart.matches(":focus-visible") && read());
  chart.addEventListener("blur", hide);
  chart.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Escape") return hide();
    if (event.key === "Home" || event.key === "End") at.column = event.key === "Home" ? 0 : Infinity;
    else if (steps) [at.row, at.column] = [at.row + steps[0], at.column + steps[1]];
    else return;
    event.preventDefault();
    at.row = keep(at.row, grid ? grid.rows : lines.length);
    at.column = keep(at.column, grid ? grid.columns : lines[at.row].length);
    read();
  });
}

document.querySelectorAll(".chart:has(script)").forEach(setUp);
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));

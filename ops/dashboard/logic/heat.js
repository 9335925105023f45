// Where the cells of the layer picture are. A cell per layer; the layers of a stage stand together,
// under the stage's name. The fewer layers there are, the larger the cells; with very many, a stage is
// a line with its name at the left.

const STAGE_GAP = 14;
const LABEL_HEIGHT = 18;
const LABEL_WIDTH = 34;
const ROW_GAP = 10;
const MAX_CELL = { width: 128, height: 200 };
// Wide enough for a plan's words; more is of no use.
const WORDS_WIDTH = 54;
const MIN_ROOMY = { width: 22, height: 20 };
// For pictures with many cells, largest first.
const FLOWING = [[34, 32, 2], [22, 20, 2], [14, 12, 1], [9, 8, 1]];
const LINES = [[14, 12, 1], [9, 8, 1], [6, 6, 1], [4, 4, 1]];
const sizeOf = ([width, height, gap]) => ({ width, height, gap });

// Rows of `perRow` stages that fill the width; null when the cells would be too small to read.
function roomy(counts, width, maxHeight, perRow) {
  const gap = 3;
  const rows = Math.ceil(counts.length / perRow);
  // By the row with the most layers.
  let cellWidth = MAX_CELL.width;
  for (let row = 0; row < rows; row += 1) {
    const inRow = counts.slice(row * perRow, (row + 1) * perRow);
    const layers = Math.max(1, inRow.reduce((sum, n) => sum + n, 0));
    const free = width - (inRow.length - 1) * (STAGE_GAP - gap);
    cellWidth = Math.min(cellWidth, Math.floor((free + gap) / layers) - gap);
  }
  const forRow = (maxHeight - (rows - 1) * ROW_GAP) / rows - LABEL_HEIGHT;
  const cellHeight = Math.min(MAX_CELL.height, Math.floor(forRow));
  if (cellWidth < MIN_ROOMY.width || cellHeight < MIN_ROOMY.height) return null;
  const size = { width: cellWidth, height: Math.min(cellHeight, Math.max(40, 3 * cellWidth)), gap };
  const picture = flow(counts, width, size);
  if (picture.height > maxHeight) return null;
  const worth = Math.min(size.width, WORDS_WIDTH) + Math.min(size.height, WORDS_WIDTH);
  return { size, picture, worth };
}

function groupColumns(size, n, width) {
  const fit = Math.max(1, Math.floor((width + size.gap) / (size.width + size.gap)));
  return Math.min(Math.max(1, n), fit);
}

// Stages one after the other, in as many rows as they need.
function flow(counts, width, size) {
  const groups = [];
  let x = 0;
  let y = 0;
  let rowHeight = 0;
  counts.forEach((count, index) => {
    const columns = groupColumns(size, count, width);
    const rows = Math.max(1, Math.ceil(count / columns));
    const w = Math.max(columns * (size.width + size.gap) - size.gap, 40);
    const h = rows * (size.height + size.gap) - size.gap + LABEL_HEIGHT;
    if (x > 0 && x + w > width) {
      x = 0;
      y += rowHeight + ROW_GAP;
      rowHeight = 0;
    }
    groups.push({ index, x, y, cellsX: x, cellsY: y + LABEL_HEIGHT, width: w, columns, count });
    x += w + STAGE_GAP;
    rowHeight = Math.max(rowHeight, h);
  });
  return { groups, height: groups.length > 0 ? y + rowHeight : 0 };
}

function lines(counts, width, least) {
  const most = Math.max(1, ...counts);
  const fit = Math.floor((width - LABEL_WIDTH) / most) - least.gap;
  const size = { ...least, width: Math.max(least.width, Math.min(fit, 2 * least.height)) };
  const groups = [];
  let y = 0;
  counts.forEach((count, index) => {
    const columns = groupColumns(size, count, width - LABEL_WIDTH);
    const rows = Math.max(1, Math.ceil(count / columns));
    groups.push({
      index, x: 0, y, cellsX: LABEL_WIDTH, cellsY: y, width: columns * (size.width + size.gap), columns, count,
    });
    y += rows * (size.height + size.gap) + (rows > 1 ? 2 : 0);
  });
  return { size, picture: { groups, height: y }, inLines: true };
}

function choose(counts, width, maxHeight) {
  let best = null;
  for (let perRow = counts.length; perRow >= 1; perRow -= 1) {
    const found = roomy(counts, width, maxHeight, perRow);
    if (found && (!best || found.worth > best.worth)) best = found;
  }
  if (best) return best;
  for (const size of FLOWING.map(sizeOf)) {
    const picture = flow(counts, width, size);
    if (picture.height <= maxHeight) return { size, picture };
  }
  let found = null;
  for (const size of LINES.map(sizeOf)) {
    found = lines(counts, width, size);
    if (found.picture.height <= maxHeight) break;
  }
  return found;
}

// counts[s]: layers of stage s. As high as maxHeight, or higher when even the smallest cells need it.
export function layout(counts, width, maxHeight) {
  const { size, picture, inLines = false } = choose(counts, width, maxHeight);
  const starts = [];
  let total = 0;
  for (const n of counts) {
    starts.push(total);
    total += n;
  }
  return { ...picture, size, width, inLines, starts, total };
}

// The rectangle of layer number `cell`, counted over all stages.
export function cellRect(picture, cell) {
  const group = picture.groups[stageOf(picture, cell)];
  const within = cell - picture.starts[group.index];
  const { size } = picture;
  return {
    x: group.cellsX + (within % group.columns) * (size.width + size.gap),
    y: group.cellsY + Math.floor(within / group.columns) * (size.height + size.gap),
    width: size.width,
    height: size.height,
    stage: group.index,
    within,
  };
}

export function stageOf(picture, cell) {
  let low = 0;
  let high = picture.starts.length - 1;
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (picture.starts[middle] <= cell) low = middle; else high = middle - 1;
  }
  return low;
}

// The cell at a point, or -1.
export function cellAt(picture, x, y) {
  const { size } = picture;
  for (const group of picture.groups) {
    const dx = x - group.cellsX;
    const dy = y - group.cellsY;
    if (dx < 0 || dy < 0 || dx >= group.width) continue;
    const column = Math.floor(dx / (size.width + size.gap));
    const within = Math.floor(dy / (size.height + size.gap)) * group.columns + column;
    if (column < group.columns && within < group.count) return picture.starts[group.index] + within;
  }
  return -1;
}

// Where an arrow key leads; the same cell when it leads out of the picture.
export function neighbour(picture, cell, key) {
  const last = picture.total - 1;
  const rect = cellRect(picture, cell);
  const step = picture.size.height + picture.size.gap;
  const x = rect.x + rect.width / 2;
  const y = rect.y + rect.height / 2;
  const nearest = (direction) => {
    for (let at = y + direction * step; at > 0 && at < picture.height + step; at += direction * 4) {
      const found = cellAt(picture, x, at);
      if (found >= 0 && found !== cell) return found;
    }
    return cell;
  };
  switch (key) {
    case 'ArrowRight': return Math.min(last, cell + 1);
    case 'ArrowLeft': return Math.max(0, cell - 1);
    case 'ArrowDown': return nearest(1);
    case 'ArrowUp': return nearest(-1);
    case 'Home': return 0;
    case 'End': return last;
    default: return cell;
  }
}

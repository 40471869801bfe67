// Runs before the first paint, so that a chosen theme does not flash. app.js changes it later.
try {
  const theme = JSON.parse(localStorage.getItem("headwater:theme") || "null");
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // Without storage the system's colours hold.
}

// How the rows of a weight are shared out among threads.

constexpr int PANEL = 32;  // outputs that are a thread's piece of work

// The panels of all jobs, each of which has `out` rows of the weight from its first_row on: panel
// number(i) of job(i) is the i-th piece of work.
template <class Job>
struct Panels {
  const Job* jobs;
  long each, count;
  Panels(const std::vector<Job>& own, int out)
      : jobs(own.data()), each((out + PANEL - 1) / PANEL), count(each * long(own.size())) {}
  const Job& job(long i) const { return jobs[i / each]; }
  int number(long i) const { return int(i % each); }
  // The first row of the panel after the i-th, of the same job or another.
  long ahead(long i) const {
    const long next = std::min(i + 1, count - 1);
    return job(next).first_row + long(number(next)) * PANEL;
  }
};

// Tokens that are multiplied by the same `out` rows of the weight, which begin at `first_row`.
template <class T>
struct RowJob {
  T* y;
  const T* x;
  int num_tokens, in, out, first_row;
};

// Those of all groups that have tokens: starts[g] to starts[g + 1] times rows g · out to (g + 1) · out.
template <class T>
void find_jobs(T* y, const T* x, const int32_t* starts, int num_groups, int in, int out, std::vector<RowJob<T>>& jobs) {
  jobs.clear();
  for (int g = 0; g < num_groups; g++) {
    const int first = starts[g], count = starts[g + 1] - first;
    if (count > 0) jobs.push_back({y + long(first) * out, x + long(first) * in, count, in, out, g * out});
  }
}

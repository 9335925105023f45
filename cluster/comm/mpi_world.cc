#include "cluster/comm/mpi_world.h"

#include <mpi.h>
#include <unistd.h>

#include <array>
#include <random>
#include <utility>
#include <vector>

#include "cluster/comm/backoff.h"
#include "cluster/comm/mpi_device_group.h"
#include "cluster/comm/mpi_host_group.h"
#include "cluster/comm/mpi_progress.h"
#include "cluster/comm/watchdog.h"

namespace spindle::comm {

struct MpiWorld::State {
  MpiWorldOptions options;
  int rank = 0;
  int size = 1;
  int local_rank = 0;
  int local_size = 1;
  std::string host_name;
  std::vector<MPI_Comm> comms;  // owned; all duplicates of MPI_COMM_WORLD
  MPI_Comm end_comm = MPI_COMM_NULL;
  MpiProgress progress;
  std::unique_ptr<MpiHostGroup> host;
  std::unique_ptr<MpiDeviceGroup> device;

  Result<MPI_Comm> duplicate_world();
  Status find_local_rank();
  Status agree_on_epoch(std::uint32_t& epoch);
  Status make_groups();
  Status meet_at_end(Deadline deadline);
};

namespace {

Status start_mpi() {
  int running = 0;
  if (Status s = mpi_status(MPI_Initialized(&running), "MPI_Initialized"); !s.ok()) return s;
  if (running != 0) return unavailable("MPI is initialized already");
  int provided = MPI_THREAD_SINGLE;
  const int code = MPI_Init_thread(nullptr, nullptr, MPI_THREAD_MULTIPLE, &provided);
  if (Status s = mpi_status(code, "MPI_Init_thread"); !s.ok()) return s;
  if (provided < MPI_THREAD_MULTIPLE) {
    MPI_Finalize();
    return unavailable("the MPI library does not offer MPI_THREAD_MULTIPLE (it offers level " +
                       std::to_string(provided) + "); Spindle needs it");
  }
  return {};
}

}  // namespace

Result<MPI_Comm> MpiWorld::State::duplicate_world() {
  MPI_Comm comm = MPI_COMM_NULL;
  Status s = mpi_status(MPI_Comm_dup(MPI_COMM_WORLD, &comm), "MPI_Comm_dup");
  if (!s.ok()) return s;
  comms.push_back(comm);
  s = mpi_status(MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  if (!s.ok()) return s;
  return comm;
}

Status MpiWorld::State::find_local_rank() {
  MPI_Comm local = MPI_COMM_NULL;
  Status s = mpi_status(
      MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &local),
      "MPI_Comm_split_type");
  if (!s.ok()) return s;
  comms.push_back(local);
  s = mpi_status(MPI_Comm_rank(local, &local_rank), "MPI_Comm_rank");
  if (!s.ok()) return s;
  return mpi_status(MPI_Comm_size(local, &local_size), "MPI_Comm_size");
}

Status MpiWorld::State::agree_on_epoch(std::uint32_t& epoch) {
  if (rank == 0) epoch = std::random_device{}();
  return mpi_status(MPI_Bcast(&epoch, sizeof epoch, MPI_BYTE, 0, MPI_COMM_WORLD), "MPI_Bcast");
}

Status MpiWorld::State::make_groups() {
  int code = MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  if (Status s = mpi_status(code, "MPI_Comm_set_errhandler"); !s.ok()) return s;
  code = MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  if (Status s = mpi_status(code, "MPI_Comm_rank"); !s.ok()) return s;
  code = MPI_Comm_size(MPI_COMM_WORLD, &size);
  if (Status s = mpi_status(code, "MPI_Comm_size"); !s.ok()) return s;
  std::array<char, MPI_MAX_PROCESSOR_NAME> name{};
  int length = 0;
  code = MPI_Get_processor_name(name.data(), &length);
  if (Status s = mpi_status(code, "MPI_Get_processor_name"); !s.ok()) return s;
  host_name.assign(name.data(), static_cast<std::size_t>(length));

  std::uint32_t epoch = 0;
  if (Status s = find_local_rank(); !s.ok()) return s;
  if (Status s = agree_on_epoch(epoch); !s.ok()) return s;
  ChannelComms channels{};
  for (MPI_Comm& comm : channels) {
    auto made = duplicate_world();
    if (!made.ok()) return made.status();
    comm = *made;
  }
  MpiDeviceGroup::LaneComms lanes{};
  for (MPI_Comm& comm : lanes) {
    auto made = duplicate_world();
    if (!made.ok()) return made.status();
    comm = *made;
  }
  auto made = duplicate_world();
  if (!made.ok()) return made.status();
  end_comm = *made;
  host = std::make_unique<MpiHostGroup>(channels, epoch, progress);
  device = std::make_unique<MpiDeviceGroup>(lanes, progress);
  return {};
}

// A rank enters the barrier when its own sends have arrived, and keeps receiving until the barrier
// is through: behind it no message is under way on any communicator.
Status MpiWorld::State::meet_at_end(Deadline deadline) {
  MPI_Request barrier = MPI_REQUEST_NULL;
  bool entered = false;
  Backoff backoff;
  for (;;) {
    progress.reap();
    host->discard_arrived();
    device->discard_arrived();
    if (!entered && !progress.sends_pending()) {
      const int code = MPI_Ibarrier(end_comm, &barrier);
      if (code != MPI_SUCCESS) return mpi_status(code, "MPI_Ibarrier");
      entered = true;
    }
    if (entered) {
      int done = 0;
      const int code = MPI_Test(&barrier, &done, MPI_STATUS_IGNORE);
      if (code != MPI_SUCCESS) return mpi_status(code, "MPI_Ibarrier");
      if (done != 0 && host->idle() && device->idle()) return {};
    }
    if (deadline.passed()) {
      return deadline_exceeded(entered ? "the other ranks do not end"
                                       : "the other ranks do not take what was sent to them");
    }
    backoff.pause(deadline, true);
  }
}

Result<std::unique_ptr<MpiWorld>> MpiWorld::init(const MpiWorldOptions& options) {
  auto state = std::make_unique<State>();
  state->options = options;
  const Watchdog watchdog(options.init_timeout, options.failure_exit_code,
                          "MPI did not start within " +
                              std::to_string(options.init_timeout.count()) +
                              " ms: are all ranks running?");
  if (Status s = start_mpi(); !s.ok()) return s;
  if (Status s = state->make_groups(); !s.ok()) return s;
  return std::unique_ptr<MpiWorld>(new MpiWorld(std::move(state)));
}

MpiWorld::MpiWorld(std::unique_ptr<State> state) : state_(std::move(state)) {}

MpiWorld::~MpiWorld() {
  const MpiWorldOptions& options = state_->options;
  const std::string me = "rank " + std::to_string(state_->rank);
  state_->host->shutdown("the job ends");
  state_->device->abort("the job ends");
  Status met = state_->meet_at_end(Deadline::after(options.finalize_timeout));
  if (!met.ok()) {
    print_to_stderr(me + " exits without the others: " + met.message());
    ::_exit(options.failure_exit_code);
  }
  const Watchdog watchdog(options.finalize_timeout, options.failure_exit_code,
                          me + ": MPI_Finalize hangs, exiting");
  for (MPI_Comm& comm : state_->comms) MPI_Comm_free(&comm);
  MPI_Finalize();
}

int MpiWorld::rank() const { return state_->rank; }
int MpiWorld::size() const { return state_->size; }
int MpiWorld::local_rank() const { return state_->local_rank; }
int MpiWorld::local_size() const { return state_->local_size; }
const std::string& MpiWorld::host_name() const { return state_->host_name; }
void MpiWorld::set_waiting(Waiting waiting) { state_->progress.set_waiting(waiting); }
HostGroup& MpiWorld::host() { return *state_->host; }
DeviceGroup& MpiWorld::device() { return *state_->device; }

}  // namespace spindle::comm
